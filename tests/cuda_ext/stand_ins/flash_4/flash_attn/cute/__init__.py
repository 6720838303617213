"""flash-attn-4 4.0.0b36: a part of the package flash_attn, without that package's front."""
