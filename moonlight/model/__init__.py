"""The Moonlight model on Megatron-Core: layers, loss and initial weights. `build.build_model` is the entry point.

Imports moonlight.kernels, moonlight.config, moonlight.dist_checkpoint and other layers below the model. It does not
import moonlight.optim, moonlight.plan, moonlight.train or any other layer above.
"""
