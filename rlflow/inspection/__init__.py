"""Looking at stored rollouts: which ones, what the rewards say of them now, and as data to train on."""
