"""What a policy is worth: pass@k, tables and figures."""
