"""Each algorithm of the book as loops over Python floats, sharing no code with the package."""
