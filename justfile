# Fine-tunes the embedded base on the embedded data.
train *args:
    cargo run --release -- train {{args}}

# Every test.
test:
    cargo test --release --workspace

# What .ci/run checks before the tests.
check:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps

# The whole of CI.
ci:
    .ci/run

# The benchmark: `just bench cpu`, `just bench cpu --small`. bench/setup installs the other engines.
bench *args:
    cargo run --release -p candlewick-bench -- {{args}}
