"""The proof: is an engine what the reference is, in what it decides and in what it computes?"""
