//! candlewick-kernels
