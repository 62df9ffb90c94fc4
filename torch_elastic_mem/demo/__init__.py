"""`tem demo`: a small model that trains and serves from one arena, and the proof that neither can tell."""
