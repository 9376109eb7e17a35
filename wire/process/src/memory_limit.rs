//! The memory that a process has: what its control group allows, or a part of the machine's.

use std::{fs, path::Path};

/// Share of the control group's limit that is held for peers, in percent. The rest is for the
/// program itself, its connections, and the kernel's socket buffers, which count too.
const PERCENT_OF_CGROUP: u64 = 40;
/// Share of the machine's memory that is held for peers where no limit is set, in percent.
const PERCENT_OF_MACHINE: u64 = 25;
/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Number of bytes to hold for peers where `--memory-limit` is not set; 0 if nothing is known.
pub(crate) fn default_limit() -> u64 {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let machine = machine_memory(&read("/proc/meminfo"));
    let cgroup = cgroup_limit(Path::new(CGROUPS), &read("/proc/self/cgroup"));
    limit_from(cgroup, machine)
}

fn limit_from(cgroup: Option<u64>, machine: Option<u64>) -> u64 {
    match (cgroup, machine) {
        (Some(limit), Some(machine)) if limit >= machine => machine / 100 * PERCENT_OF_MACHINE,
        (Some(limit), _) => limit / 100 * PERCENT_OF_CGROUP,
        (None, Some(machine)) => machine / 100 * PERCENT_OF_MACHINE,
        (None, None) => 0,
    }
}

/// The least limit of the groups that a process is in: version 2 (`0::/path`) or version 1
/// (`5:memory:/path`). In a container the path may be that of the host, of which only the root is
/// mounted.
fn cgroup_limit(root: &Path, groups: &str) -> Option<u64> {
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if controllers.is_empty() {
            least(root, path, "memory.max")
        } else if controllers.split(',').any(|it| it == "memory") {
            least(&root.join("memory"), path, "memory.limit_in_bytes")
        } else {
            None
        }
    };
    groups.lines().filter_map(of_line).min()
}

/// The least value of `file` in the group and in those above it.
fn least(root: &Path, path: &str, file: &str) -> Option<u64> {
    let group = Path::new(path.trim_start_matches('/'));
    // "max", which is no limit, is no number.
    let value =
        |group: &Path| fs::read_to_string(root.join(group).join(file)).ok()?.trim().parse().ok();
    group.ancestors().filter_map(value).min()
}

/// The `MemTotal` of `/proc/meminfo`, in bytes.
fn machine_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, contents) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        root
    }

    #[test]
    fn the_least_limit_of_all_groups_counts() {
        let two = root(&[
            ("memory.max", "max\n"),
            ("pods/memory.max", "31457280\n"),
            ("pods/agent/memory.max", "max\n"),
        ]);
        assert_eq!(cgroup_limit(two.path(), "0::/pods/agent\n"), Some(30 * MIB));
        assert_eq!(cgroup_limit(two.path(), "0::/\n"), None);
        let one = root(&[
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/pods/memory.limit_in_bytes", "31457280\n"),
        ]);
        let groups = "5:cpu,memory:/pods\n4:pids:/pods\n0::/pods\n";
        assert_eq!(cgroup_limit(one.path(), groups), Some(30 * MIB));
    }

    #[test]
    fn a_container_that_sees_its_own_group_as_the_root_has_its_limit() {
        let root = root(&[("memory.max", "31457280\n")]);
        assert_eq!(cgroup_limit(root.path(), "0::/kubepods/pod1/container1\n"), Some(30 * MIB));
    }

    #[test]
    fn without_a_limit_a_quarter_of_the_machine_counts() {
        let machine = machine_memory("MemTotal:        4096 kB\nMemFree:  1 kB\n");
        assert_eq!(machine, Some(4 * MIB));
        let unlimited = Some(1 << 62);
        assert_eq!(limit_from(unlimited, Some(100 * MIB)), 25 * MIB);
        assert_eq!(limit_from(None, Some(100 * MIB)), 25 * MIB);
        assert_eq!(limit_from(Some(30 * MIB), Some(100 * MIB)), 30 * MIB / 100 * 40);
        assert_eq!(limit_from(None, None), 0);
        assert_eq!(machine_memory(""), None);
    }
}
