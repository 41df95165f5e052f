"""What the words of the algorithm table compute: pure functions, and the objectives that bind them to a recipe.

    advantages, reductions, kl_reward, preference_targets   numpy, driver side: a whole batch at once
    policy_losses, kl, corrections, value_losses,
    preference_losses                                       torch: per token or per pair, tensors and numbers only
    batch, objectives                                       torch: a micro-batch to its share of loss and metrics

Nothing here knows of ranks or micro-batches: denominators are global and come as arguments.
"""
