"""What runs which case: the first pattern that fits its name.

A runner takes a Case and returns a Result. Kinds without a runner are for later: the
tool says so.
"""

import functools

from parity_runners import (
  adapters,
  generation,
  losses,
  quantised,
  rollouts,
  schedules,
  texts,
  transformer,
  vaes,
)

# pattern, runner, whether it has results that depend on `Case.reference`
RUNNERS = (
  ("schedule/flow_match*", schedules.flow_match, True),
  ("schedule/solvers*", schedules.solvers, False),
  ("schedule/denoising_step_list*", schedules.step_lists, False),
  ("losses/ar_*", losses.ar_loss, False),
  ("self_forcing/*", rollouts.run, True),
  ("losses/dmd_generator*", losses.generator_loss, True),
  ("losses/critic_flow*", losses.critic_loss, True),
  ("losses/timestep_sampling*", losses.timestep_draws, False),
  ("t5/encoder*", texts.encoder, False),
  ("t5/text_cleaning*", texts.cleaning, False),
  ("prompts/*", texts.prompt_lists, False),
  ("vae/*", vaes.run, False),
  ("dit_components/rope*", transformer.rotary, False),
  ("dit_components/time_embedding*", transformer.time_embedding, False),
  ("dit_components/block_intermediates*", transformer.intermediates, False),
  ("dit_train/*", transformer.train, True),
  ("dit_inference/*", generation.calls, True),
  ("pipeline/*", generation.pipeline, True),
  ("nvfp4/kv_quant_pipeline*", generation.quantised_pipeline, False),
  ("nvfp4/quantize_1d*", functools.partial(quantised.matrices, tiles=False), False),
  ("nvfp4/quantize_2d*", functools.partial(quantised.matrices, tiles=True), False),
  ("nvfp4/hadamard_transpose*", quantised.rotated, False),
  ("nvfp4/kv_cache_roundtrip*", quantised.cache_blocks, False),
  ("nvfp4/w4a4_linear*", quantised.linear, False),
  ("nvfp4/linear_training*", quantised.training, False),
  ("lora/merge*", adapters.merge, False),
  ("lora/key_map*", adapters.key_map, False),
)
