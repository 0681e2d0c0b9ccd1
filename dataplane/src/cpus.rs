//! Which CPUs there are for this process, and how a thread stays on one.

use core_affinity::CoreId;

/// The CPUs that the calling thread may run on, ascending; none if the kernel refuses to tell, as
/// it does beyond 1,024 CPUs.
pub fn allowed_cpus() -> Vec<usize> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    cores.iter().map(|core| core.id).collect()
}

/// Keeps the calling thread on a CPU; false if it may not run there.
pub fn pin_to_cpu(cpu: usize) -> bool {
    core_affinity::set_for_current(CoreId { id: cpu })
}
