"""Files and directories: names, JSON, safetensors, atomic output, hashes, the Hub's cache."""
