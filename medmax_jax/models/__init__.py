"""Contains the networks, their tokenizer and their preprocessing.

attention      Computes causal attention inside packed documents.
chameleon      Defines Chameleon, an early-fusion transformer over text and image tokens alike.
guidance_streams
               Defines the token streams that guidance compares where an image is generated.
image_headers  Limits what an image file can make its decoder allocate, before Pillow reads the
               file.
image_range    Maps samples of more than 8 bits to 8 bits, by the range the file states or by their
               own.
images         Converts image files to the pixels that the VQGAN reads, as Meta's Chameleon does.
kv_cache       Runs Chameleon against a KV cache: a chunk of a prompt, or one more token per row.
layers         Defines the parts of a Chameleon layer: Linear with LoRA, Embed, the two norms, RoPE.
quantization   Stores the frozen matrices of the layers in 8 or 4 bits, in the format the layers
               read.
tokenizer      Converts text to token ids and back, and builds token sequences from text and image
               codes.
vocab          Defines every id of the Chameleon vocabulary and its meaning.
vqgan          Defines Chameleon's VQGAN, the image tokenizer: pixels <-> a raster of codes.
"""
