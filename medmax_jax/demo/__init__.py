"""The demo page: chat, images from text, adapters side by side, codes and likelihoods."""
