"""The base as it is in the checkpoint."""


class Unquantized:
    """Leaves every linear alone."""

    bits = 16

    @staticmethod
    def flag_errors(config) -> list[str]:
        if "n_bits" in config.explicit_flags and config.n_bits != 4:
            return [f"--n_bits {config.n_bits}: {config.train_type} does not quantize; use an hqq_* train type"]
        return []

    @classmethod
    def from_config(cls, config, *, checkpoint_dtype):
        return None
