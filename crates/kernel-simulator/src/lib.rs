//! kernel-simulator
