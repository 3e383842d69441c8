"""The error of a reward that gave no scores."""


class RewardError(RuntimeError):
    """A reward gave no scores.

    Args:
        where: names the reward, e.g. "config.reward.path='my_rewards:sharp'".
        reason: what went wrong, for one line.
    """

    exit_status = 1

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason
