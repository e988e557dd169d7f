"""The thirteen sources of MedMax, read in the formats that they are published in."""
