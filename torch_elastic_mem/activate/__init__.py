"""Gives torch its allocator in a program that was started by `tem run`, and in that program's children.

`tem run` puts the folder `startup` in front of the program's PYTHONPATH, where Python finds a
sitecustomize. That waits for the program to import torch and then calls `install`. Nothing lies where Python
looks by itself, so no other interpreter is touched.
"""
