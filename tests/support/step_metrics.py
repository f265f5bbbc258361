"""The metrics of a rollout batch that the display and the plots show."""

STEP_METRICS = {
    "reward/mean": 0.5,
    "eval/accuracy": 0.9375,
    "response/length_mean": 21.25,
    "ratio/log_w_mean": -0.0123,
    "ratio/log_w_std": 0.0456,
    "weight/mean": 0.98,
    "weight/mean/positive": 0.991,
    "weight/mean/negative": 0.962,
    "weight/ess": 0.875,
    "weight/dead_share": 0.125,
    "policy/lag_mean": 1.5,
    "train/tokens_per_second": 1234.4,
    "rollout/tokens_per_second": 987.0,
    "check/max_logprob_difference": 3.14e-6,
    "time/generate": 3.14,
    "time/train": 12.0,
}
