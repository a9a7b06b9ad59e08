"""Backbones with the term index, keyed dropout, folding and export."""
