"""Image and text encoders for scoring.

biomedclip    BiomedCLIP maps images and texts to unit vectors of one space; their dot product is
              the score.
efficientnet  EfficientNet-Lite0 computes ImageNet features of images, used where BiomedCLIP's
              weights are absent.
modality      Classifies whether an image has the requested modality; a score with a known upper
              bound.
scorer        Encoders that score images and captions: BiomedCLIP and EfficientNet-Lite0, one
              protocol.
"""
