"""vLLM on an arena: an engine whose KV cache grows, shrinks and yields.

`TEM_ENABLE=1 vllm serve MODEL` is all it takes: vLLM finds `plugin.register` through its entry point
`vllm.general_plugins`. Importing this package imports neither vLLM nor torch.
"""
