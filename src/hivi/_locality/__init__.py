"""The locality engine: which coordinates of a latent can each element of a factor touch?"""
