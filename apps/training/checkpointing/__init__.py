"""Checkpoints to go on from: written in the background, complete or not there, read by any number of workers.

SAVE_PATH/iter_K/
    config.json, tokenizer …, model*.safetensors      as `AutoModelForCausalLM.from_pretrained` opens them
    optimizer-0000i-of-0000N.safetensors              worker i's share of the optimizer's state and masters, and its
                                                      backend buffers and random numbers
    trained*.safetensors                              in place of all these, of a run that trains low-rank updates
    state.json, metrics.csv                           what the run was, its evaluations, every step so far
    manifest.json                                     written last: each file's bytes and sha256
"""
