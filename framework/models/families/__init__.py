"""How each family of published models writes our architecture down: names of tensors, keys of config.json.

Importing this room enters them all into the registry; it is free of torch.
"""

from framework.models.families import bert, chatglm, gpt, llama, own, t5  # noqa: F401
