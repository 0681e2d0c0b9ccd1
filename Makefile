# `make demo` and `make test` install what is missing (Debian packages, as root) and do the rest.

CARGO ?= cargo

.PHONY: all demo test lint guard guard-update benches check-aarch64 packages nextest schema clean

all:
	$(CARGO) build --release --locked

# Two QEMU guests and the host talk to each other through ringwayd.
demo: packages all
	target/release/ringway-bench lab --queues 1 --mtu 1500 --seconds 3

# Everything that CI runs.
test: packages nextest lint check-aarch64 guard benches
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --workspace --doc --quiet
	$(CARGO) nextest run --locked --workspace

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

# Needs no cross compiler: nothing but tests and benches builds C.
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

nextest:
	@$(CARGO) nextest --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-nextest

# The control API's schema, after a change of its types.
schema:
	RINGWAY_UPDATE_SCHEMA=1 $(CARGO) test --locked -p ringway-control committed_schema

clean:
	$(CARGO) clean
