"""What training, decoding and PPO reach on a card: `launch/gpu` runs it behind the kernels' benchmarks.

On a CPU it runs with tiny sizes, which is how it is tested; its speeds there say nothing. No GPU has run it yet.
"""
