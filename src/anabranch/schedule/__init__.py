"""Where and when work runs: pipelines that train over devices, and the serving of language models."""
