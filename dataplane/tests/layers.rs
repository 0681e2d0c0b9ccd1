//! The order of the dataplane's modules, and the files that may hold `unsafe`: read from the
//! sources, so that neither is a matter of habit.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every module of the crate's root; each imports only those before it.
const LAYERS: &[&str] = &[
    // Leaves: of the processor, or pure functions.
    "backoff",
    "burst_lock",
    "clock",
    "cpus",
    "events",
    "fd_limit",
    "isa",
    "link",
    "netlink",
    "log_limit",
    "call",
    "placement",
    "socket_file",
    "topology",
    "wake",
    // From bytes to the switch.
    "memory",
    "wire",
    "burst",
    "capture",
    "ring",
    "offload",
    "vhost_user",
    "port",
    "worker",
    "housekeeping",
    "switch",
];

/// A line of a source file, without its comment.
struct Line {
    file: PathBuf,
    number: usize,
    code: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

/// The code of all files below a folder that goes into the product: no tests, no comments.
fn product_code(folder: &Path) -> Vec<Line> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    let mut lines = Vec::new();
    for path in entries {
        let name = path.file_stem().unwrap().to_str().unwrap();
        if name == "tests" || name.starts_with("test_") {
            continue;
        }
        if path.is_dir() {
            lines.extend(product_code(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            lines.extend(lines_of(&path));
        }
    }
    lines
}

/// The lines of a file, down to the tests at its foot.
fn lines_of(file: &Path) -> Vec<Line> {
    let text = fs::read_to_string(file).unwrap();
    let end = text
        .find("\n#[cfg(test)]\nmod tests {")
        .unwrap_or(text.len());
    let code = text[..end]
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""));
    (1..)
        .zip(code)
        .map(|(number, code)| Line {
            file: file.into(),
            number,
            code: code.into(),
        })
        .collect()
}

/// The first names of the paths in a line that begin at the crate's root, for a file whose module
/// is `depth` below it: behind `crate::`, or behind as many `super::`.
fn names_at_root(code: &str, depth: usize) -> Vec<&str> {
    let supers = "super::".repeat(depth);
    ["crate::", &supers]
        .iter()
        .flat_map(|start| {
            code.match_indices(*start)
                .map(|(at, start)| at + start.len())
        })
        .map(|at| {
            let rest = &code[at..];
            &rest[..rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len())]
        })
        .collect()
}

/// The path of modules to a file in `src`: `["port", "tap"]` for `port/tap.rs`.
fn module_path(src: &Path, file: &Path) -> Vec<String> {
    let inner = file.strip_prefix(src).unwrap().with_extension("");
    inner
        .iter()
        .map(|part| part.to_str().unwrap().to_owned())
        .filter(|part| part != "mod")
        .collect()
}

#[test]
fn modules_import_only_those_below_them() {
    let src = root().join("dataplane/src");
    let rank = |module: &str| LAYERS.iter().position(|layer| *layer == module);
    let mut wrong = Vec::new();
    for Line { file, number, code } in product_code(&src) {
        let path = module_path(&src, &file);
        if path == ["lib"] {
            continue;
        }
        let module = path[0].as_str();
        let place = format!("{}:{number}", file.display());
        let Some(own) = rank(module) else {
            panic!("{place}: give the module {module} a place in LAYERS");
        };
        for name in names_at_root(&code, path.len()) {
            match rank(name) {
                Some(other) if other <= own => {}
                Some(_) => wrong.push(format!(
                    "{place}: {module} imports {name}, which is above it"
                )),
                None => wrong.push(format!(
                    "{place}: {name} is no module: import it from where it is"
                )),
            }
        }
    }
    let is_there =
        |layer: &&&str| src.join(layer).is_dir() || src.join(format!("{layer}.rs")).is_file();
    let gone: Vec<_> = LAYERS.iter().filter(|layer| !is_there(layer)).collect();
    assert!(
        gone.is_empty(),
        "no longer there, strike from LAYERS: {gone:?}"
    );
    assert!(
        wrong.is_empty(),
        "against the order of LAYERS:\n{}",
        wrong.join("\n")
    );
}

/// The files in the table below "Files with `unsafe`" in docs/architecture.md.
fn files_with_leave() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let (_, section) = text
        .split_once("\n## Files with `unsafe`\n")
        .expect("the section");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned())
        .collect()
}

/// Whether a line of code has the keyword; `unsafe_code`, a lint's name, is another word.
fn is_unsafe(code: &str) -> bool {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|word| word == "unsafe")
}

#[test]
fn unsafe_is_only_where_the_architecture_says() {
    let crates = [
        "bridge",
        "dataplane",
        "dataplane/guest",
        "dataplane/xdp",
        "control",
        "control/api",
        "bench",
    ];
    let found: BTreeSet<String> = crates
        .iter()
        .flat_map(|name| product_code(&root().join(name).join("src")))
        .filter(|line| is_unsafe(&line.code))
        .map(|line| {
            line.file
                .strip_prefix(root())
                .unwrap()
                .display()
                .to_string()
        })
        .collect();
    let leave = files_with_leave();
    let wrong: Vec<_> = found.difference(&leave).collect();
    assert!(
        wrong.is_empty(),
        "not in docs/architecture.md, \"Files with `unsafe`\": {wrong:#?}"
    );
    let gone: Vec<_> = leave.difference(&found).collect();
    assert!(
        gone.is_empty(),
        "without `unsafe`, strike from docs/architecture.md: {gone:#?}"
    );
}
