"""F2: tokenizers in the Hugging Face format: load one, or train one. Left out: what is done with ids (`data`)."""
