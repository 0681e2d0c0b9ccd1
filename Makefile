# `make demo` and `make test` say what is missing (Debian packages; programs of crates.io), install it and do
# the rest. With RINGWAY_INSTALL=no they say it, with the command, and stop.

CARGO ?= cargo
# Without root the tests that need it are skipped, and nextest tells which and how many.
export NEXTEST_PROFILE ?= $(if $(filter 0,$(shell id -u)),default,user)

.PHONY: all demo test lint guard guard-update benches check-aarch64 packages schema clean

all:
	$(CARGO) build --release --locked

# Two QEMU guests and the host talk to each other through ringwayd. Cargo knows where its target folder is.
demo: packages all
	$(CARGO) run --release --locked --quiet --bin ringway-bench -- lab --queues 1 --mtu 1500 --seconds 3

# Everything that CI runs.
test: packages cargo-nextest lint check-aarch64 guard benches
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --workspace --doc --quiet
	$(CARGO) nextest run --locked --workspace

# Formatting, lints, documentation, licences and sources of dependencies (deny.toml), dependencies that
# nothing uses, the dataplane's layers, and the build without AF_XDP.
lint: cargo-deny cargo-machete
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --workspace --no-default-features -- -D warnings
	@! $(CARGO) tree --locked --workspace --no-default-features -e normal,build | grep -E 'xsk-rs|lib(bpf|xdp)-sys|pcap v'
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items --quiet
	$(CARGO) deny --locked --log-level warn check --hide-inclusion-graph bans licenses sources
	$(CARGO) machete
	$(CARGO) test --locked --quiet -p ringway-dataplane --test layers

# A check without linking, but libxdp and libbpf are C: it takes a compiler that crosses (`make packages`).
check-aarch64: packages
	@rustup target add aarch64-unknown-linux-gnu
	C_INCLUDE_PATH=/usr/aarch64-linux-gnu/include $(CARGO) check --locked --workspace --target aarch64-unknown-linux-gnu

# Fails if a frame costs more instructions than dataplane/benches/instructions.txt allows.
guard: packages
	$(CARGO) bench --locked --no-run -p ringway-dataplane --bench fixed
	@dataplane/benches/instructions.sh

# Sets the bounds a little above today's counts.
guard-update: packages
	@dataplane/benches/instructions.sh update

# Each bench once, to see that it runs; `cargo bench` measures.
benches:
	$(CARGO) bench --locked --quiet -p ringway-bridge -p ringway-dataplane -- --test

packages:
	@sh bench/install-packages.sh

# Programs of crates.io that cargo runs: a few minutes each to build, once.
.PHONY: cargo-nextest cargo-deny cargo-machete
cargo-nextest cargo-deny cargo-machete:
	@sh bench/install-cargo-tool.sh $@

# The control API's schema, after a change of its types.
schema:
	RINGWAY_UPDATE_SCHEMA=1 $(CARGO) test --locked -p ringway-control committed_schema

clean:
	$(CARGO) clean
