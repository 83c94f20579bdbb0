"""RMSNorm, rotary embedding and gated units."""
