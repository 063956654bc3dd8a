//! candle-fused
