//! The guest image: a distribution's kernel as it is, and an initramfs of busybox, the NIC's
//! driver and iperf3, made once and kept in the cache; or with another kernel, more drivers and
//! programs, for one run.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use crate::hint::hinted;
use crate::process::{self, Origin, ProcessError, run, run_ok};

/// What to do if there is no kernel with zero-copy.
const ZERO_COPY_HINT: &str = "run `bench/install-packages.sh zero-copy` as root";

const INIT: &str = include_str!("init.sh");
const NETUP: &str = include_str!("netup.sh");
const BYTES: &str = include_str!("bytes.sh");

/// The driver whose modules (with all that they depend on) the guest loads.
const NIC_DRIVER: &str = "virtio_net";

/// Bound on each helper program; they take milliseconds.
const HELPER_TIMEOUT: Duration = Duration::from_secs(20);

/// What QEMU boots.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// Version of the kernel, as in `6.12.95+deb12-cloud-amd64`.
    pub(crate) kernel_version: String,
}

/// `$XDG_CACHE_HOME/ringway`, or `~/.cache/ringway`.
pub(crate) fn cache_folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("ringway"))
}

/// Makes the image, or takes the cached one if its inputs are the same.
pub(crate) fn prepare(cache: &Path) -> Result<Image> {
    let kernel = Kernel::find(&cache.join("kernel/current"), Origin::LAB_HINT)?;
    let modules = kernel.modules(&[NIC_DRIVER])?;
    let programs = GuestPrograms::find(&[find("iperf3")?])?;

    let mut hasher = DefaultHasher::new();
    (INIT, NETUP, BYTES, &kernel.version).hash(&mut hasher);
    for path in modules.iter().chain([&programs.busybox]) {
        let metadata = path.metadata()?;
        (path, metadata.len(), metadata.modified()?).hash(&mut hasher);
    }
    for path in programs.others.iter().chain(&programs.libraries) {
        let metadata = path.metadata()?;
        (path, metadata.len(), metadata.modified()?).hash(&mut hasher);
    }
    let initramfs = cache.join(format!("initramfs-{:016x}.cpio", hasher.finish()));
    if !initramfs.is_file() {
        let bytes = build(&modules, &programs)?;
        write_whole(cache, &initramfs, &bytes)?;
    }
    Ok(kernel.image(initramfs))
}

/// Makes an image with the kernel that has zero-copy, these drivers, and iperf3 and these programs
/// of the host in /usr/bin. It is written to `folder`.
pub(crate) fn prepare_zero_copy(
    cache: &Path,
    drivers: &[&str],
    programs: &[PathBuf],
    folder: &Path,
) -> Result<Image> {
    let kernel = Kernel::find(&cache.join("kernel/zero-copy"), ZERO_COPY_HINT)?;
    let modules = kernel.modules(drivers)?;
    let programs = GuestPrograms::find(&[&[find("iperf3")?], programs].concat())?;
    let initramfs = folder.join("initramfs.cpio");
    let bytes = build(&modules, &programs)?;
    write_whole(folder, &initramfs, &bytes)?;
    Ok(kernel.image(initramfs))
}

/// Writes a file so that no reader ever sees a part of it.
pub(crate) fn write_whole(folder: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let file = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(file.path(), bytes)?;
    file.persist(path)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

/// A kernel package's files.
struct Kernel {
    file: PathBuf,
    version: String,
    /// The folder of its modules.
    modules: PathBuf,
}

impl Kernel {
    /// What is unpacked in `root`. Newer packages have the kernel beside its modules.
    fn find(root: &Path, hint: &'static str) -> Result<Self> {
        for tree in ["lib/modules", "usr/lib/modules"] {
            for entry in std::fs::read_dir(root.join(tree)).into_iter().flatten() {
                let folder = entry?.path();
                let name = folder.file_name().unwrap_or_default();
                let version = name.to_string_lossy().into_owned();
                let files = [
                    root.join(format!("boot/vmlinuz-{version}")),
                    folder.join("vmlinuz"),
                ];
                let file = files.into_iter().find(|file| file.is_file());
                let modules = folder.join("kernel");
                if let (Some(file), true) = (file, modules.is_dir()) {
                    return Ok(Self {
                        file,
                        version,
                        modules,
                    });
                }
            }
        }
        let missing = format!("no guest kernel is unpacked in {}", root.display());
        Err(hinted(missing, hint))
    }

    /// The drivers' modules, each after those that it needs. What is built in has no file.
    fn modules(&self, drivers: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        collect_files(&self.modules, &mut files)?;
        let mut ordered = Vec::new();
        for driver in drivers {
            add_module(driver, &files, &mut ordered)?;
        }
        if ordered.is_empty() {
            bail!(
                "the guest kernel {} has no module {}",
                self.version,
                drivers.join(", ")
            );
        }
        Ok(ordered)
    }

    fn image(self, initramfs: PathBuf) -> Image {
        Image {
            kernel: self.file,
            initramfs,
            kernel_version: self.version,
        }
    }
}

/// A program that the lab's packages bring.
fn find(program: &str) -> Result<PathBuf, ProcessError> {
    process::find(program, Origin::LabPackages)
}

fn add_module(name: &str, files: &[PathBuf], ordered: &mut Vec<PathBuf>) -> Result<()> {
    let Some(path) = files.iter().find(|path| module_name(path) == name) else {
        return Ok(());
    };
    if ordered.contains(path) {
        return Ok(());
    }
    let mut modinfo = Command::new(find("modinfo")?);
    let needs = run_ok(modinfo.args(["-F", "depends"]).arg(path), HELPER_TIMEOUT)?;
    for needed in needs.trim().split(',').filter(|name| !name.is_empty()) {
        add_module(&needed.replace('-', "_"), files, ordered)?;
    }
    ordered.push(path.clone());
    Ok(())
}

/// `…/net_failover.ko.xz` is `net_failover`; dashes count as underscores.
fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split(".ko")
        .next()
        .unwrap_or_default()
        .replace('-', "_")
}

fn collect_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_files(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

struct GuestPrograms {
    busybox: PathBuf,
    others: Vec<PathBuf>,
    /// Shared libraries and the loader of the others.
    libraries: BTreeSet<PathBuf>,
}

impl GuestPrograms {
    fn find(others: &[PathBuf]) -> Result<GuestPrograms> {
        let busybox = find("busybox")?;
        if !libraries_of(&busybox)?.is_empty() {
            return Err(hinted("busybox is not static", Origin::LAB_HINT));
        }
        let mut libraries = BTreeSet::new();
        for program in others {
            libraries.extend(libraries_of(program)?);
        }
        Ok(GuestPrograms {
            busybox,
            others: others.to_vec(),
            libraries,
        })
    }
}

fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = run(Command::new("ldd").arg(program), HELPER_TIMEOUT)?;
    Ok(parse_ldd(&output.stdout))
}

/// Absolute paths in ldd's output; a static program has none.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

fn build(modules: &[PathBuf], programs: &GuestPrograms) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    let mut folders = BTreeSet::new();
    for folder in [
        "bin", "dev", "lib", "modules", "proc", "sys", "tmp", "usr/bin",
    ] {
        add_folder(&mut archive, &mut folders, Path::new(folder));
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", INIT.as_bytes());
    archive.file("bin/netup", NETUP.as_bytes());
    archive.file("bin/bytes", BYTES.as_bytes());
    archive.file("bin/busybox", &read(&programs.busybox)?);
    for program in &programs.others {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("usr/bin/{name}"), &stripped(program)?);
    }
    for library in &programs.libraries {
        let inside = library.strip_prefix("/").unwrap_or(library);
        // The loader's path is written in the program; the rest are found by LD_LIBRARY_PATH.
        let name = inside.file_name().unwrap_or_default();
        let is_loader = name.to_string_lossy().starts_with("ld-");
        let target = if is_loader {
            inside.to_owned()
        } else {
            Path::new("lib").join(name)
        };
        if let Some(folder) = target.parent() {
            add_folder(&mut archive, &mut folders, folder);
        }
        archive.file(&target.to_string_lossy(), &read(library)?);
    }
    let mut order = String::new();
    for module in modules {
        let name = format!("{}.ko", module_name(module));
        archive.file(&format!("modules/{name}"), &module_bytes(module)?);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    Ok(archive.finish())
}

/// Adds a folder and its parents, each once.
fn add_folder(archive: &mut Archive, done: &mut BTreeSet<PathBuf>, folder: &Path) {
    let mut chain: Vec<_> = folder
        .ancestors()
        .filter(|path| path.parent().is_some())
        .collect();
    chain.reverse();
    for path in chain {
        if done.insert(path.to_owned()) {
            archive.directory(&path.to_string_lossy());
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// A program without its debug information, which is most of what cargo builds.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let file = tempfile::NamedTempFile::new()?;
    let mut strip = Command::new(find("strip")?);
    run_ok(
        strip.arg("-o").arg(file.path()).arg(program),
        HELPER_TIMEOUT,
    )?;
    read(file.path())
}

/// A module, uncompressed: busybox's insmod can't.
fn module_bytes(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return read(path);
    }
    let output = Command::new(find("xz")?).arg("-dc").arg(path).output()?;
    if !output.status.success() {
        bail!(
            "xz -dc {}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_paths_include_the_loader_and_skip_the_vdso() {
        let text = "\tlinux-vdso.so.1 (0x7f)\n\tlibm.so.6 => /lib/x/libm.so.6 (0x7f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let paths = parse_ldd(text);
        assert_eq!(
            paths,
            ["/lib/x/libm.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from)
        );
        assert!(parse_ldd("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn module_names_ignore_compression_and_dashes() {
        assert_eq!(module_name(Path::new("/a/virtio-net.ko.xz")), "virtio_net");
        assert_eq!(module_name(Path::new("failover.ko")), "failover");
    }

    #[test]
    fn parents_come_before_children() {
        let mut archive = Archive::new();
        let mut done = BTreeSet::new();
        add_folder(&mut archive, &mut done, Path::new("usr/lib/x"));
        add_folder(&mut archive, &mut done, Path::new("usr/lib"));
        let text = String::from_utf8_lossy(&archive.finish()).into_owned();
        let (first, second) = (text.find("usr\0"), text.find("usr/lib\0"));
        assert!(first.is_some() && first < second);
        assert_eq!(done.len(), 3);
    }
}
