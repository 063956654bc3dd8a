//! candlewick
