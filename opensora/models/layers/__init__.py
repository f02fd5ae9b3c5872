"""Pieces that several denoisers are made of; each computes on the tokens it is given and knows no neighbours."""
