"""What kinds of sources can be packed; find.py tells which one lies in a folder."""
