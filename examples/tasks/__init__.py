"""From a task to its table: target model, trajectories, CLLM and report, each step resumable."""
