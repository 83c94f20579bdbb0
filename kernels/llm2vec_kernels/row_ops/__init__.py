"""RMSNorm, rotary embedding, gated units and dropout."""
