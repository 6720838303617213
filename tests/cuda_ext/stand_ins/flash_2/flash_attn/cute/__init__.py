"""What flash-attn 2.8.3 brings along where version 4 stands: its first draft."""
