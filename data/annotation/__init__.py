"""Add documents to records whose answers a model generated, and that pass three filters."""
