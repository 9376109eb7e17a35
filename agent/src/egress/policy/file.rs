//! `--egress-policy-file`: a kind of rule and its rules on each line.

use std::path::Path;

use culvert_process::reload::{Files, LoadError};

use super::{AddressRule, Policy};

impl Policy {
    /// The rules of the flags and those of the file.
    ///
    /// # Errors
    /// With everything that is wrong with the file. One without a rule is refused, because an allow
    /// list that was lost by mistake would allow everything.
    pub(crate) fn with_file(&self, path: &Path, files: &mut Files) -> Result<Self, LoadError> {
        let shown = path.display();
        let contents = files.read(path)?;
        let text = str::from_utf8(&contents)
            .map_err(|_| LoadError::new(format!("{shown}: holds no text")))?;
        let rules = parse(text).map_err(|faults| {
            let faults: Vec<_> = faults.iter().map(|fault| format!("{shown}:{fault}")).collect();
            LoadError::new(faults.join("; "))
        })?;
        if rules == Self::default() {
            return Err(LoadError::new(format!("{shown}: holds no rule")));
        }
        let mut policy = self.clone();
        policy.extend(rules);
        Ok(policy)
    }
}

/// The rules in `text`, or what is wrong with it, each with its line.
fn parse(text: &str) -> Result<Policy, Vec<String>> {
    let (mut policy, mut faults) = (Policy::default(), Vec::new());
    for (line, number) in text.lines().zip(1..) {
        let rule = line.split('#').next().unwrap_or_default().trim();
        if rule.is_empty() {
            continue;
        }
        let (kind, list) = rule.split_once(char::is_whitespace).unwrap_or((rule, ""));
        let (rules, invalid) = AddressRule::parse_list(list);
        let kind_rules = match kind {
            "exempt" => &mut policy.exempt,
            "deny" => &mut policy.deny,
            "allow" => &mut policy.allow,
            _ => {
                faults.push(format!("{number}: a line begins with exempt, deny or allow"));
                continue;
            }
        };
        if rules.is_empty() && invalid.is_empty() {
            faults.push(format!("{number}: {kind} without an address or network"));
        }
        kind_rules.extend(rules);
        faults.extend(invalid.iter().map(|fault| format!("{number}: {fault}")));
    }
    if faults.is_empty() { Ok(policy) } else { Err(faults) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(contents: &str) -> Result<Policy, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, contents).unwrap();
        let flags = Policy { deny: vec!["10.9.0.0/16".parse().unwrap()], ..Policy::default() };
        let path = file.path().display().to_string();
        let policy = flags.with_file(file.path(), &mut Files::default());
        policy.map_err(|error| error.to_string().replace(&path, "FILE"))
    }

    #[test]
    fn the_rules_of_a_file_join_those_of_the_flags() {
        let policy = read(
            "# comment\n\nallow 10.0.0.0/8, 10.0.0.7:443\n  deny\t[fd00::/8]:22 # why\n\
             allow fd00::/8\r\nexempt 169.254.20.10",
        );
        let policy = policy.unwrap();
        assert_eq!(format!("{:?}", policy.exempt), "[169.254.20.10]");
        assert_eq!(format!("{:?}", policy.deny), "[10.9.0.0/16, [fd00::/8]:22]");
        assert_eq!(format!("{:?}", policy.allow), "[10.0.0.0/8, 10.0.0.7:443, fd00::/8]");
    }

    #[test]
    fn every_fault_of_a_file_is_reported_with_its_line() {
        let fault = read("permit 10.0.0.0/8\ndeny\n\nallow 10.0.0.1/8,x").unwrap_err();
        assert_eq!(fault.matches("FILE:").count(), 4, "{fault}");
        for part in [
            "FILE:1: a line begins with exempt, deny or allow; ",
            "FILE:2: deny without an address or network; ",
            "FILE:4: \"10.0.0.1/8\" has bits set behind its prefix; write 10.0.0.0/8; ",
            "FILE:4: \"x\" is no rule",
        ] {
            assert!(fault.contains(part), "{part} in {fault}");
        }
    }

    #[test]
    fn a_file_without_a_rule_does_not_allow_everything() {
        for contents in ["", "# allow 10.0.0.0/8\n"] {
            assert_eq!(read(contents).unwrap_err(), "FILE: holds no rule");
        }
    }
}
