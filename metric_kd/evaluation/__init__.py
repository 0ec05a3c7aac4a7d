"""Measuring a network: embed the images, find neighbours, count hits. Nothing here trains, and nothing imports faiss
before the first search."""
