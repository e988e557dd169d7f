"""The demo page: chat, images from text, adapters side by side, codes and likelihoods.

answers  Run requests of the page through the engine service, and collect what they answer.
markup   Write the parts of the page that are HTML of our own: head, figures, tables, style.
page     Lay out the demo page with gradio, and connect it to the engine service.
uploads  Read an uploaded image to pixels in memory, and delete its file at once.
"""
