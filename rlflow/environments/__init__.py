"""What answers a policy: environments, tools, and adapters to environments that people have. No Ray, no torch."""

from rlflow.environments.protocol import Environment, EnvironmentFault, Reply

__all__ = ["Environment", "EnvironmentFault", "Reply"]
