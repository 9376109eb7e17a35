//! `--egress-exempt`, `--egress-deny`, `--egress-allow` and the file: what the agent connects to.

use std::path::PathBuf;

use culvert_process::faults::Faults;

use super::Flags;
use crate::egress::policy::{AddressRule, Policy};

/// The addresses that the agent may connect to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EgressConfig {
    /// The rules of the flags.
    pub policy: Policy,
    /// File with more rules, if there is one.
    pub policy_file: Option<PathBuf>,
    /// Whether denials are only counted and logged.
    pub audit: bool,
}

impl EgressConfig {
    /// Where the rules come from, for people.
    pub(crate) fn source(&self) -> String {
        let flags = (!self.policy.is_empty()).then(|| "flags".to_owned());
        let file = self.policy_file.as_ref().map(|file| file.display().to_string());
        let sources: Vec<_> =
            ["built-in rules".to_owned()].into_iter().chain(flags).chain(file).collect();
        sources.join(", ")
    }
}

pub(super) fn check(flags: &Flags, faults: &mut Faults) -> EgressConfig {
    let mut rules = |flag, lists: &[String]| {
        let mut rules = Vec::new();
        for list in lists {
            let (found, invalid) = AddressRule::parse_list(list);
            rules.extend(found);
            invalid.iter().for_each(|fault| faults.add(flag, fault.to_string()));
        }
        rules
    };
    let policy = Policy {
        exempt: rules("egress-exempt", &flags.egress_exempt),
        deny: rules("egress-deny", &flags.egress_deny),
        allow: rules("egress-allow", &flags.egress_allow),
    };
    // An allow list without a rule, as a template makes it of an empty value, would allow all.
    let is_blank = |list: &String| list.split(',').all(|item| item.trim().is_empty());
    let is_blank = !flags.egress_allow.is_empty() && flags.egress_allow.iter().all(is_blank);
    let reason = "holds no rule; omit the flag to allow everything";
    faults.require(!is_blank, "egress-allow", reason);
    let policy_file = faults.file("egress-policy-file", &flags.egress_policy_file);
    if let Some(path) = &policy_file {
        faults.contents("egress-policy-file", path, |files| policy.with_file(path, files));
    }
    if flags.egress_audit {
        faults.warn(
            "egress-audit",
            "the egress policy is not enforced, nor are its built-in denials",
        );
    }
    EgressConfig { policy, policy_file, audit: flags.egress_audit }
}
