"""The networks, their tokenizer and their preprocessing.

attention      Causal attention inside packed documents.
chameleon      Chameleon: an early-fusion transformer over text and image tokens alike.
image_headers  Bound what an image file makes its decoder allocate, from the header, before Pillow
               reads it.
image_range    Map samples of more than 8 bits to 8, by the range that a file states, or else by
               their own.
images         Image files to the pixels that the VQGAN reads, as Meta's Chameleon does it.
kv_cache       Chameleon against a cache of keys and values: a piece of a prompt, or one more token
               a row.
layers         The parts of a Chameleon layer: Linear with LoRA inside, Embed, the two norms, RoPE.
quantization   The frozen matrices of the layers in 8 or 4 bits, as the layers read them.
tokenizer      Text <-> token ids, and the one place where text and image codes become a sequence.
vocab          Every id of the Chameleon vocabulary, and which of them mean what.
vqgan          The image tokenizer: Chameleon's VQGAN, pixels <-> a raster of codes.
"""
