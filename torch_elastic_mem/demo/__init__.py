"""`tem demo`: a small model trains and serves from the same memory, with the proof that neither can tell."""
