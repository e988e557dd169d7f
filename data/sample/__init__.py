"""The embedded sample: real biomedical images with documented licences, and text of their facts."""
