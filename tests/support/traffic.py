"""One exchange of the optimizer, and the bytes of a group."""


def exchange(optimizer):
    """Reduce gradients to their owners, update, and gather the weights, for every bucket."""
    optimizer.data_parallel.zero_grad_buffer()
    optimizer.data_parallel.finish_grad_sync()
    optimizer.step(learning_rate=1e-3, weight_decay=0.1, step=1, gradient_norm=1.0)
    optimizer.data_parallel.finish_param_sync()


def both(stats):
    """Return the bytes sent and received."""
    return stats.sent, stats.received
