//! An address from a frontend: what is accepted reads back as it is shown.
#![no_main]

use culvert_wire::Target;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|address: &str| {
    if let Ok(target) = address.parse::<Target>() {
        assert_eq!(target.to_string().parse::<Target>().as_ref(), Ok(&target));
    }
});
