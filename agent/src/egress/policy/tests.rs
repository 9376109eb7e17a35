use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use std::str::FromStr as _;

use proptest::prelude::*;

use super::*;

fn policy(exempt: &str, deny: &str, allow: &str) -> Policy {
    let [exempt, deny, allow] = [exempt, deny, allow].map(|list| {
        let (rules, faults) = AddressRule::parse_list(list);
        assert_eq!(faults, []);
        rules
    });
    Policy { exempt, deny, allow }
}

/// The decision in short: `ok`, or the rule as people see it.
fn decided(policy: &Policy, address: &str) -> String {
    match policy.decide(address.parse().unwrap()) {
        Decision::Allowed => "ok".into(),
        Decision::Denied(rule) => rule.to_string(),
    }
}

#[test]
fn without_rules_the_built_in_denials_apply() {
    for (address, decision) in [
        ("10.0.0.7:10250", "ok"),
        ("127.0.0.1:10248", "ok"),
        ("[::1]:10248", "ok"),
        ("[fd00::7]:10250", "ok"),
        ("[2001:db8::7]:443", "ok"),
        ("169.254.169.254:80", "link-local"),
        ("[fe80::1]:80", "link-local"),
        ("[fe80::a9fe:a9fe]:80", "link-local"),
        ("[fd00:ec2::254]:80", "metadata service"),
        ("[fd00:ec2::23]:80", "metadata service"),
        ("[fd20:ce::254]:80", "metadata service"),
        ("100.100.100.200:80", "metadata service"),
        ("168.63.129.16:32526", "metadata service"),
        ("224.0.0.251:5353", "multicast"),
        ("[ff02::1]:80", "multicast"),
        ("255.255.255.255:80", "broadcast"),
        ("0.0.0.0:10248", "unspecified"),
        ("0.1.2.3:80", "unspecified"),
        ("[::]:10248", "unspecified"),
    ] {
        assert_eq!(decided(&Policy::default(), address), decision, "{address}");
    }
}

#[test]
fn another_spelling_of_a_denied_address_is_denied() {
    for (address, rule) in [
        // IPv4-mapped and IPv4-compatible.
        ("[::ffff:169.254.169.254]:80", "link-local"),
        ("[::ffff:0.0.0.0]:80", "unspecified"),
        ("[::169.254.169.254]:80", "link-local"),
        // NAT64, with each length that a prefix for local use may have.
        ("[64:ff9b::a9fe:a9fe]:80", "link-local"),
        ("[64:ff9b::6464:64c8]:80", "metadata service"),
        ("[64:ff9b:1::a9fe:a9fe]:80", "link-local"),
        ("[64:ff9b:1:abcd:a9:fea9:fe00::]:80", "link-local"),
        ("[64:ff9b:1:aba9:fe:a9fe::]:80", "link-local"),
        ("[64:ff9b:1:a9fe:a9:fe00::]:80", "link-local"),
        // 6to4 and Teredo.
        ("[2002:a9fe:a9fe::1]:80", "link-local"),
        ("[2001:0:a9fe:a9fe::]:80", "link-local"),
        ("[2001:0:102:304:0:0:5601:5601]:80", "link-local"),
        // SIIT, and ISATAP behind any prefix.
        ("[::ffff:0:169.254.169.254]:80", "link-local"),
        ("[::ffff:0:6464:64c8]:80", "metadata service"),
        ("[2001:db8::5efe:169.254.169.254]:80", "link-local"),
        ("[fd00::200:5efe:a9fe:a9fe]:80", "link-local"),
        ("[2002:102:304::5efe:a9fe:a9fe]:80", "link-local"),
        ("[2002:a9fe:a9fe::5efe:102:304]:80", "link-local"),
    ] {
        assert_eq!(decided(&Policy::default(), address), rule, "{address}");
    }
    for address in [
        "[64:ff9b::a00:7]:80",
        "[64:ff9b:1::a00:7]:80",
        "[2002:a00:7::1]:80",
        "[2001:db8::a9fe:a9fe]:80",
        "[::ffff:0:a00:7]:80",
        "[2001:db8::5efe:a00:7]:80",
        "[2001:db8::100:5efe:a9fe:a9fe]:80",
    ] {
        assert_eq!(decided(&Policy::default(), address), "ok", "{address}");
    }
}

#[test]
fn the_deny_list_comes_before_the_allow_list_and_the_built_in_denials_before_both() {
    let policy =
        policy("169.254.20.10:53", "10.1.0.0/16,10.0.0.0/8:22", "10.0.0.0/8,169.254.0.0/16");
    for (address, decision) in [
        ("10.0.0.7:443", "ok"),
        ("10.0.0.7:22", "deny 10.0.0.0/8:22"),
        ("10.1.0.7:443", "deny 10.1.0.0/16"),
        ("192.168.0.1:443", "not in the allow list"),
        ("[fd00::1]:443", "not in the allow list"),
        ("169.254.169.254:80", "link-local"),
        ("169.254.20.10:53", "ok"),
        ("169.254.20.10:80", "link-local"),
    ] {
        assert_eq!(decided(&policy, address), decision, "{address}");
    }
}

#[test]
fn an_address_is_exempt_or_allowed_by_itself_alone() {
    let exempt = policy("169.254.169.254", "", "");
    assert_eq!(decided(&exempt, "169.254.169.254:80"), "ok");
    assert_eq!(decided(&exempt, "[::ffff:169.254.169.254]:80"), "ok", "it is the same address");
    assert_eq!(decided(&exempt, "[64:ff9b::a9fe:a9fe]:80"), "link-local");
    let allow = policy("", "", "10.0.0.0/8");
    assert_eq!(decided(&allow, "[64:ff9b::a00:7]:80"), "not in the allow list");
}

#[test]
fn every_rule_has_a_label() {
    let rules = [
        Rule::Builtin(Builtin::LinkLocal),
        Rule::Builtin(Builtin::Unspecified),
        Rule::Deny("10.0.0.0/8".parse().unwrap()),
        Rule::NotAllowed,
    ];
    for rule in rules {
        assert!(Rule::labels().any(|label| label == rule.label()), "{rule}");
    }
    assert_eq!(Rule::labels().count(), Builtin::ALL.len() + 2);
}

/// Addresses of all kinds, often near one another, so that rules meet them.
fn addresses() -> impl Strategy<Value = IpAddr> {
    let near = |v4: u32| Ipv4Addr::from(0x0a00_0000 | (v4 & 0x0103_0003));
    prop_oneof![
        any::<u32>().prop_map(move |v4| near(v4).into()),
        any::<u32>().prop_map(|v4| Ipv4Addr::from(v4).into()),
        any::<u32>().prop_map(move |v4| near(v4).to_ipv6_mapped().into()),
        any::<u32>().prop_map(move |v4| nat64(near(v4)).into()),
        any::<u128>().prop_map(|v6| Ipv6Addr::from(v6).into()),
        (0xa9fe_a900..=0xa9fe_a9ff_u32).prop_map(|v4| Ipv4Addr::from(v4).into()),
    ]
}

fn nat64(v4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from((0x0064_ff9b_u128 << 96) | u128::from(u32::from(v4)))
}

/// IPv6 addresses that lead to `v4`; `other` is in what they have beside it.
fn spellings(v4: Ipv4Addr, other: u64) -> [Ipv6Addr; 8] {
    let (v4, other) = (u128::from(u32::from(v4)), u128::from(other));
    [
        nat64(Ipv4Addr::from(v4 as u32)),
        // IPv4-compatible.
        Ipv6Addr::from(v4),
        // SIIT.
        Ipv6Addr::from((0xffff_0000 << 32) | v4),
        // ISATAP, with and without the bit of a unique identifier.
        Ipv6Addr::from((other << 64) | (0x5efe << 32) | v4),
        Ipv6Addr::from((other << 64) | (0x0200_5efe << 32) | v4),
        // 6to4.
        Ipv6Addr::from((0x2002 << 112) | (v4 << 80) | other),
        // Teredo's server, and its client.
        Ipv6Addr::from((0x2001_0000 << 96) | (v4 << 64) | other),
        Ipv6Addr::from((0x2001_0000 << 96) | (other << 32) | (v4 ^ 0xffff_ffff)),
    ]
}

fn sockets() -> impl Strategy<Value = SocketAddr> {
    (addresses(), prop_oneof![Just(443_u16), 1..=u16::MAX]).prop_map(SocketAddr::from)
}

fn rules() -> impl Strategy<Value = Vec<AddressRule>> {
    let ports = prop_oneof![Just(None), (1_u16..1000, 1_u16..1000).prop_map(Some)];
    let rule = (addresses(), 0_u8..=128, ports).prop_map(|(address, length, ports)| {
        let address = address.to_canonical();
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let network = ipnet::IpNet::new(address, length.min(longest)).unwrap().trunc();
        match ports {
            None => network.to_string(),
            Some((a, b)) => format!("[{network}]:{}-{}", a.min(b), a.max(b)),
        }
    });
    let rules = prop::collection::vec(rule, 0..4);
    rules.prop_map(|rules| rules.iter().filter_map(|rule| rule.parse().ok()).collect())
}

fn policies() -> impl Strategy<Value = Policy> {
    (rules(), rules(), rules()).prop_map(|(exempt, deny, allow)| Policy { exempt, deny, allow })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_denied_address_stays_denied_with_more_denials(
        policy in policies(), more in rules(), address in sockets(),
    ) {
        let mut stricter = policy.clone();
        stricter.deny.extend(more);
        if policy.decide(address) != Decision::Allowed {
            prop_assert_ne!(stricter.decide(address), Decision::Allowed);
        }
    }

    #[test]
    fn what_is_in_the_deny_list_is_denied_whatever_else_there_is(
        policy in policies(), address in sockets(),
    ) {
        let mut policy = policy;
        policy.deny.push(AddressRule::from_str(&address.ip().to_canonical().to_string()).unwrap());
        prop_assert_ne!(policy.decide(address), Decision::Allowed);
    }

    #[test]
    fn an_allowed_address_is_in_the_allow_list_if_there_is_one(
        policy in policies(), address in sockets(),
    ) {
        if policy.decide(address) == Decision::Allowed {
            let (ip, port) = (address.ip().to_canonical(), address.port());
            let is_listed = |rules: &[AddressRule]| rules.iter().any(|rule| rule.matches(ip, port));
            prop_assert!(policy.allow.is_empty() || is_listed(&policy.allow));
            prop_assert!(!is_listed(&policy.deny));
            prop_assert!(is_listed(&policy.exempt) || Builtin::of(ip).is_none());
        }
    }

    #[test]
    fn an_ipv4_mapped_address_is_the_ipv4_address(
        policy in policies(), v4 in any::<u32>(), port in 1..=u16::MAX,
    ) {
        let v4 = Ipv4Addr::from(v4);
        let mapped = policy.decide((v4.to_ipv6_mapped(), port).into());
        prop_assert_eq!(policy.decide((v4, port).into()), mapped);
    }

    #[test]
    fn an_ipv6_address_is_denied_if_an_ipv4_address_that_it_leads_to_is(
        policy in policies(), v4 in 0x0100_0000..=u32::MAX, other in any::<u64>(),
        port in 1..=u16::MAX,
    ) {
        let v4 = Ipv4Addr::from(v4);
        let policy = Policy { exempt: Vec::new(), ..policy };
        if policy.decide((v4, port).into()) != Decision::Allowed
            && !matches!(policy.decide((v4, port).into()), Decision::Denied(Rule::NotAllowed))
        {
            for v6 in spellings(v4, other) {
                prop_assert_ne!(policy.decide((v6, port).into()), Decision::Allowed, "{}", v6);
            }
        }
    }

    #[test]
    fn a_rule_is_read_as_it_is_shown(rules in rules()) {
        for rule in rules {
            prop_assert_eq!(rule.to_string().parse::<AddressRule>().unwrap(), rule);
        }
    }
}
