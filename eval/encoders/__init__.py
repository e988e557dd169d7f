"""Image and text encoders for scoring.

biomedclip    BiomedCLIP: pictures and texts to unit vectors of one space, whose dot product is the
              score.
efficientnet  EfficientNet-Lite0 of ImageNet: features of pictures where BiomedCLIP's weights are
              absent.
modality      Does a picture look like the modality it was asked for? A small score with a known
              ceiling.
scorer        Encoders that score images and captions: BiomedCLIP and EfficientNet-Lite0, one
              protocol.
"""
